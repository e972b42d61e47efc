#!/usr/bin/env bash
# One database POSTGRES_DB of one user POSTGRES_USER with POSTGRES_PASSWORD, on port 5432.
set -euo pipefail
bin=$(echo /usr/lib/postgresql/*/bin)
data=/var/lib/postgresql/data
if [[ ! -e $data/PG_VERSION ]]; then
  "$bin/initdb" -D $data --username="$POSTGRES_USER" --pwfile=<(echo "$POSTGRES_PASSWORD") \
    --auth-local=trust --auth-host=scram-sha-256 >/dev/null
  echo 'host all all all scram-sha-256' >>$data/pg_hba.conf
  "$bin/postgres" --single -D $data postgres <<<"CREATE DATABASE $POSTGRES_DB;" >/dev/null
fi
exec "$bin/postgres" -D $data -c listen_addresses='*' -c unix_socket_directories=/tmp
