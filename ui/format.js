// Times, numbers and texts as people read them (pure). Times are shown in the reader's zone.

const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

// What a text holds that cannot be seen, or would turn its neighbours around, is shown by its number.
export function visible(text) {
  return String(text).replace(CONTROL, (char) => {
    const code = char.charCodeAt(0);
    if (code < 32) return String.fromCharCode(0x2400 + code);
    return code === 127 ? "\u2421" : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

export function clip(text, limit) {
  const chars = String(text);
  return chars.length > limit ? chars.slice(0, limit) + "…" : chars;
}

const NUMBER = new Intl.NumberFormat("en");
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export function count(value) {
  if (value === null || value === undefined) return "–";
  return value < 100000 ? NUMBER.format(value) : COMPACT.format(value);
}

export function rate(perMinute) {
  if (perMinute === null || perMinute === undefined) return "–";
  return perMinute < 10 && perMinute > 0 ? perMinute.toFixed(1) : count(Math.round(perMinute));
}

export function share(part, whole) {
  if (!whole) return "–";
  const percent = (part * 100) / whole;
  return percent > 0 && percent < 0.1 ? "<0.1%" : `${percent < 10 && percent > 0 ? percent.toFixed(1) : Math.round(percent)}%`;
}

// Durations of calls; the last finite bound of the histogram is ten seconds, and what is longer is known as that only.
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.001) return "<1 ms";
  if (seconds < 1) return `${seconds < 0.1 ? (seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0) : Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${seconds < 10 ? seconds.toFixed(2).replace(/\.?0+$/, "") : Math.round(seconds)} s`;
  return age(seconds);
}

export function percentile(seconds) {
  return seconds === 10 ? "≥10 s" : duration(seconds);
}

export function age(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.floor(seconds);
  if (whole < 1) return "<1 s";
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h`;
  return `${Math.floor(whole / 86400)} d`;
}

export function bytes(value) {
  if (value < 1024) return `${value} B`;
  if (value < 1024 * 1024) return `${(value / 1024).toFixed(1)} KiB`;
  return `${(value / 1024 / 1024).toFixed(1)} MiB`;
}

const HOUR = { hour: "2-digit", minute: "2-digit", hour12: false };
const CLOCK = new Intl.DateTimeFormat(undefined, { ...HOUR, second: "2-digit" });
const DAY = new Intl.DateTimeFormat(undefined, { ...HOUR, day: "2-digit", month: "short" });
const EXACT = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });
const MINUTE = new Intl.DateTimeFormat(undefined, HOUR);

export function clock(moment, now = new Date()) {
  return moment.toDateString() === now.toDateString() ? CLOCK.format(moment) : DAY.format(moment);
}

export function exact(moment) {
  return `${EXACT.format(moment)} · ${moment.toISOString()}`;
}

export function minute(epoch) {
  return MINUTE.format(new Date(epoch * 1000));
}

// NAME of the usual namespace, else NAME.NAMESPACE.
export function shortName(name) {
  return String(name).replace(/\.openfaas-fn$/, "");
}
