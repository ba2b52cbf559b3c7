#!/bin/sh
# Make the secrets that docker-compose.yml hands to its services, each random; what is there stays as it is.
#
#     docker/make-secrets.sh [FOLDER]        default: the folder `secrets` beside this script
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
echo "requirepass $(random_hex)" | keep redis.conf

# Compose mounts these files as they are, owner and mode included.
if [ "$(id -u)" = 0 ]; then
    chown "$owner" "$folder"/jwt_secret "$folder"/ray_token "$folder"/redis.conf
else
    echo "The services run as user $owner and must be able to read them: sudo chown $owner $folder/*" >&2
fi
