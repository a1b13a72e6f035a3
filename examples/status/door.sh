#!/bin/sh
# Answers with a status of its own: 200 for a name that it knows, 404 for one that it does not, a redirect for the owner.
set -eu
case "$(cat)" in
alice) printf 'Status: 200 OK\nContent-Type: text/plain\n\nwelcome, alice\n' ;;
owner) printf 'Location: https://example.org/owner\n\n' ;;
*) printf 'Status: 404 Not Found\nContent-Type: text/plain\n\nnobody of that name\n' ;;
esac
