#!/bin/sh
# Make a certificate for development, signed by an authority that is thrown away: its key is never written to a file.
#
#     docker/edge/make-certificate.sh FOLDER [NAME_OR_ADDRESS …]        default: localhost 127.0.0.1
#
# FOLDER gets edge.key, edge.crt and edge_ca.crt, which clients are told to believe. What is there stays as it is, until
# less than a day is left of it; then what was made here is made anew, and what was not is left to its owner.
set -eu
umask 077

folder=$1
shift
if [ -e "$folder/edge.crt" ]; then
    ! openssl x509 -in "$folder/edge.crt" -noout -checkend 86400 >/dev/null || exit 0
    openssl x509 -in "$folder/edge.crt" -noout -issuer -nameopt RFC2253 | grep -Fqx "issuer=CN=Sluice development" || {
        echo "$folder/edge.crt has expired, or will within a day, and was not made here" >&2
        exit 1
    }
fi
[ $# -gt 0 ] || set -- localhost 127.0.0.1

names=
for name in "$@"; do
    case $name in
    *:* | *[0-9].*[0-9].*[0-9].*[0-9]) kind=IP ;;
    *) kind=DNS ;;
    esac
    names="${names:+$names,}$kind:$name"
done

mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkfifo "$work/ca.key"

new_key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256
}

ca_key=$(new_key)
new_key >"$work/edge.key"
printf '%s\n' "$ca_key" >"$work/ca.key" &
openssl req -x509 -new -key "$work/ca.key" -subj "/CN=Sluice development" -days 365 \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign" -out "$work/edge_ca.crt"
openssl req -new -key "$work/edge.key" -subj "/CN=$1" -out "$work/edge.csr"
printf '%s\n' "subjectAltName=$names" "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
    "extendedKeyUsage=serverAuth" "authorityKeyIdentifier=keyid" >"$work/extensions"
printf '%s\n' "$ca_key" >"$work/ca.key" &
openssl x509 -req -in "$work/edge.csr" -CA "$work/edge_ca.crt" -CAkey "$work/ca.key" -days 365 \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$work/extensions" -out "$work/edge.crt" 2>"$work/said" || {
    cat "$work/said" >&2
    exit 1
}
for file in edge_ca.crt edge.key edge.crt; do # the certificate last: it says that all is there
    chmod 0400 "$work/$file"
    [ "$file" != edge_ca.crt ] || chmod 0444 "$work/$file"
    mv -f "$work/$file" "$folder/$file"
    echo "made $folder/$file" >&2
done
