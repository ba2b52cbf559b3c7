#!/bin/sh
# Make the secrets that docker-compose.yml hands to its services, each random; what is there stays as it is.
#
#     docker/make-secrets.sh [FOLDER]        default: the folder `secrets` beside this script
#
# The edge's certificate is one for development, for localhost; edge_ca.crt beside it is what clients are told to believe.
# Put your own edge.crt (with what it was signed by) and edge.key there instead.
set -eu
umask 077

folder=${1:-$(dirname "$0")/secrets}
owner=10001:10001 # the user of our images

random_hex() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

keep() { # NAME: standard input becomes the file, unless there is one
    if [ ! -e "$folder/$1" ]; then
        cat >"$folder/$1.new"
        chmod 0400 "$folder/$1.new"
        mv "$folder/$1.new" "$folder/$1"
        echo "made $folder/$1" >&2
    fi
}

mkdir -p "$folder"
random_hex | keep jwt_secret
random_hex | keep ray_token
[ ! -e "$folder/redis.conf" ] || sed -n 's/^requirepass //p' "$folder/redis.conf" | tr -d '\n' | keep redis_password
random_hex | keep redis_password
echo "requirepass $(cat "$folder/redis_password")" | keep redis.conf

"$(dirname "$0")/edge/make-certificate.sh" "$folder" localhost 127.0.0.1

# Compose mounts these files as they are, owner and mode included.
if [ "$(id -u)" = 0 ]; then
    cd "$folder"
    chown "$owner" jwt_secret ray_token redis_password redis.conf edge.crt edge.key
else
    echo "The services run as user $owner and must be able to read them: sudo chown $owner $folder/*" >&2
fi
