// Answers a JSON array of numbers with their count, sum and mean; anything else is a failed call (status 500).
const numbers = JSON.parse(require('node:fs').readFileSync(0, 'utf8'))
if (!Array.isArray(numbers) || !numbers.every(Number.isFinite)) {
  console.error('wanted: a JSON array of numbers')
  process.exit(1)
}
const sum = numbers.reduce((total, number) => total + number, 0)
console.log(JSON.stringify({ count: numbers.length, sum, mean: numbers.length ? sum / numbers.length : null }))
