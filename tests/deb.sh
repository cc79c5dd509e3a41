# In the test machine, which is a Debian 13: installs the package, uses it as a user does, removes it.
set -eu
cd /
unset PYTHONPATH
dpkg --install /run/payload/with/vdpabridge_*.deb
[ "$(vdpabridge --version)" = "vdpabridge $(dpkg-query --show --showformat='${Version}' vdpabridge)" ]
[ "$(python3 -c 'import vdpabridge; print(vdpabridge.__file__)')" = /usr/lib/python3/dist-packages/vdpabridge/__init__.py ]
setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs vdpabridge demo
id vdpabridge | grep -q kvm
[ -d /etc/vdpabridge ]
[ "$(stat --format=%U /run/vdpabridge)" = vdpabridge ]
for kind in blk fs; do
    "$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["binary"])' \
        /usr/share/qemu/vhost-user/60-vdpabridge-$kind.json)" --print-capabilities
done
# the rule: a device's node has a name that lasts, and belongs to group kvm
/usr/lib/systemd/systemd-udevd --daemon
vdpa dev add name deb0 mgmtdev vdpasim_blk
vdpabridge bind deb0 vhost_vdpa
udevadm settle
[ "$(stat --dereference --format=%G /dev/vdpa/by-name/deb0)" = kvm ]
systemd-analyze verify /usr/lib/systemd/system/vdpabridge@.socket
udevadm control --exit
dpkg --purge vdpabridge
[ ! -e /usr/lib/python3/dist-packages/vdpabridge ]
echo "the package works"
