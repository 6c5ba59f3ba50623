#!/usr/bin/env bash
# Rehearses docker-compose.yml without Docker: its schema, and each service's own command line, together, with one run of
# the pipeline through them (tools/compose_checks.py says what is checked).
#
# Needs Linux and root, for namespaces and Debian's packages. Installs what is missing: PostgreSQL and Prometheus by apt,
# the extra `services` by pip, the schema of the Compose specification (as the package dclint carries it, of which no
# code is run) into .rehearsal/. Everything that it starts is in namespaces of its own and ends with it.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=.venv/bin/python
HERE=.rehearsal
DCLINT=3.1.0

# 77: what the rehearsal needs cannot be had here, which says nothing about docker-compose.yml.
lacks() { echo "error: $1" >&2; exit 77; }

[ -x "$PYTHON" ] || lacks "there is no $PYTHON; run \`make test\` once, which installs"
[ "$(id -u)" = 0 ] || lacks "the rehearsal makes namespaces and needs root; run it as root"
unshare --net --mount --pid --fork true || lacks "this machine does not let root make namespaces; run it on another"

packages=()
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || packages+=(postgresql)
command -v prometheus >/dev/null || packages+=(prometheus)
command -v ip >/dev/null || packages+=(iproute2)
if [ "${#packages[@]}" -gt 0 ]; then
    echo "installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # No service is started by installing it.
    { apt-get update -qq && RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${packages[@]}"; } \
        >"${TMPDIR:-/tmp}/rehearsal-apt.log" 2>&1 || lacks "apt-get cannot install ${packages[*]}; install them"
fi

mkdir -p "$HERE"
"$PYTHON" -c 'import boto3, psycopg2' 2>/dev/null ||
    "$PYTHON" -m pip install --quiet -c constraints.txt boto3 psycopg2-binary # the extra `services`
if [ ! -f "$HERE/compose-spec.json" ]; then
    (cd "$HERE" && npm pack --silent "dclint@$DCLINT" >/dev/null) || lacks "npm cannot fetch dclint@$DCLINT for its schema"
    tar --extract --to-stdout --file "$HERE/dclint-$DCLINT.tgz" package/schemas/compose.schema.json \
        >"$HERE/compose-spec.json.new"
    mv "$HERE/compose-spec.json.new" "$HERE/compose-spec.json"
fi
env RAY_TOKEN=x POSTGRES_PASSWORD=x S3_SECRET_KEY=x GRAFANA_PASSWORD=x \
    "$PYTHON" tools/compose_file.py check --schema "$HERE/compose-spec.json" || { echo "error: docker-compose.yml is not valid" >&2; exit 1; }
# With the first process of the namespaces all others end, and it ends with unshare, which hears no other signal.
folder=$(mktemp --directory --tmpdir rehearsal-XXXXXXXX)
chmod 755 "$folder"
unshare --net --mount --pid --fork --kill-child --mount-proc "$PYTHON" tools/rehearse_compose.py "$folder" &
rehearsal=$!
trap 'kill -KILL "$rehearsal" 2>/dev/null || true; wait "$rehearsal" 2>/dev/null || true; rmdir "$folder"' EXIT
trap 'exit 130' INT TERM
wait "$rehearsal"
