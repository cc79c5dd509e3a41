#!/bin/sh
# Installs the package alone, as its users do, and runs its demonstration as a user without any right.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
chmod 755 "$place"
# no symbolic link to a Python that another user may not reach
"$VDPABRIDGE_PYTHON" -m venv --copies "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check .
for program in vdpabridge vdpabridge-vhost-user-blk vdpabridge-vhost-user-fs; do
    "$place/venv/bin/$program" --help >"$place/help"
done
"$place/venv/bin/vdpabridge-vhost-user-blk" --print-capabilities
for file in service socket sysusers tmpfiles; do
    "$place/venv/bin/vdpabridge" service-file "$file" >"$place/help"
done
PATH="$place/venv/bin:$PATH" vdpabridge descriptor fs
# the test machine, without a checkout: a kernel that is built already, and the installed package in it
[ "$(cd / && "$place/venv/bin/vdpabridge-vm" -- python3 -m vdpabridge --version)" = "$("$place/venv/bin/vdpabridge" --version)" ]
code=0
(cd / && "$place/venv/bin/vdpabridge-vm") 2>"$place/help" || code=$?
[ "$code" = 120 ] && grep "the suite is in a checkout" "$place/help"
"$place/venv/bin/python" -c 'import vdpabridge; vdpabridge.open("sim:blk").close()'
cd /
if [ "$(id -u)" = 0 ]; then
    nobody="setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs"
else
    nobody=
fi
# shellcheck disable=SC2086  # a list of words
if [ -n "$nobody" ] && ! $nobody "$place/venv/bin/python" -c pass 2>/dev/null; then
    echo "that Python is not for everybody ($place/venv/bin/python): as $(id -un) then" >&2
    nobody=
fi
# shellcheck disable=SC2086
$nobody "$place/venv/bin/vdpabridge" demo
