#!/bin/sh
# Fails its first two attempts at each call and succeeds at the third; attempts are counted in a file per call id.
set -eu
id=$(printf %s "${Http_X_Call_Id:-none}" | tr -cd 'A-Za-z0-9-')
counter=${TMPDIR:-/tmp}/faashound-flaky-$id
attempt=$(($(cat "$counter" 2>/dev/null || echo 0) + 1))
if [ "$attempt" -lt 3 ]; then
    echo "$attempt" >"$counter"
    echo "attempt $attempt fails" >&2
    exit 1
fi
rm -f "$counter"
echo "attempt $attempt works"
