#!/bin/sh
# Counts the words of the request's body; a function is any program that reads stdin and writes stdout.
set -eu
words=$(wc -w)
echo "$((words)) words"
