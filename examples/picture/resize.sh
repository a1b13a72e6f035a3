#!/bin/sh
# Makes a PNG of the picture in the request's body, as wide as the query says (?width=200).
set -eu
width=${Http_Query:-}
width=${width#width=}
case $width in
'') width=200 ;;
*[!0-9]* | ?????*) echo "wanted: ?width=1 to ?width=9999" >&2 && exit 1 ;;
esac
exec convert - -strip -resize "$width" png:-
