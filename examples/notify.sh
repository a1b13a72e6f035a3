#!/bin/sh
# Receives callbacks: what a POST brings (its X-* headers, then its body) goes to the log and is kept for the next GET.
set -eu
last=${TMPDIR:-/tmp}/faashound-notify-last
if [ "$Http_Method" = GET ]; then
    cat "$last" 2>/dev/null || echo "nothing yet"
    exit
fi
new=$(mktemp "$last.XXXXXX")
{
    env | grep '^Http_X_' | sort
    cat
} >"$new"
cat "$new" >&2
mv "$new" "$last"
