#!/bin/sh
# Prints the words of the request's body one by one, as a language model prints its tokens: server-sent events.
set -eu
printf 'Content-Type: text/event-stream\nCache-Control: no-cache\n\n'
for word in $(cat); do
    printf 'data: %s\n\n' "$word"
    sleep "${PAUSE:-0.2}"
done
printf 'data: [DONE]\n\n'
