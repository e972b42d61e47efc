#!/usr/bin/env bash
# Start Ceph's monitor, one disk and the gateway on port 9000, with data in /data. The keys are AWS_ACCESS_KEY_ID and
# AWS_SECRET_ACCESS_KEY. The script ends when one of the three ends, so that the container is restarted.
set -euo pipefail
: "${AWS_ACCESS_KEY_ID:?}" "${AWS_SECRET_ACCESS_KEY:?}"
cd /data
conf=/data/ceph.conf

# A first start that was interrupted begins again.
if [[ ! -e whole ]]; then
  rm -rf mon osd keyring monmap && mkdir mon osd
  cat /proc/sys/kernel/random/uuid >fsid
fi
fsid=$(<fsid)
cat >$conf <<C
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:3300,v1:127.0.0.1:6789]
keyring = /data/keyring
run_dir = /tmp
admin_socket = /tmp/\$name.asok
log_to_stderr = false
err_to_stderr = true
log_file =
mon_cluster_log_file =
ms_bind_ipv6 = false
mon_data_avail_warn = 1
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
[mon]
mon_data = /data/mon
[osd]
osd_data = /data/osd
osd_objectstore = bluestore
osd_memory_target = 1073741824
bluestore_block_size = ${S3_BYTES:-107374182400}
[client.rgw]
rgw_frontends = beast port=9000
rgw_data = /tmp
C

if [[ ! -e whole ]]; then
  make_key() { ceph-authtool keyring --gen-key -n "$@" >/dev/null; }
  touch keyring && chmod 600 keyring
  make_key mon. --cap mon 'allow *'
  make_key client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  make_key osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd'
  make_key client.rgw --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  monmaptool --create --fsid "$fsid" --addv a '[v2:127.0.0.1:3300,v1:127.0.0.1:6789]' monmap >/dev/null
  ceph-mon -c $conf --mkfs -i a --monmap monmap --keyring keyring
fi

ceph-mon -c $conf -i a -f &
if [[ ! -e whole ]]; then
  id=$(</proc/sys/kernel/random/uuid)
  ceph -c $conf osd new "$id" >/dev/null
  ceph-osd -c $conf -i 0 --mkfs --osd-uuid "$id"
fi
ceph-osd -c $conf -i 0 -f &
touch whole
radosgw -c $conf -n client.rgw -f &
trap 'kill $(jobs -p); wait; exit 0' TERM INT
until radosgw-admin -c $conf -n client.rgw user info --uid=ktray >/dev/null 2>&1 \
   || radosgw-admin -c $conf -n client.rgw user create --uid=ktray --display-name=ktray \
        --access-key="$AWS_ACCESS_KEY_ID" --secret-key="$AWS_SECRET_ACCESS_KEY" >/dev/null 2>&1; do
  sleep 1
done
wait -n
echo "one of Ceph's daemons ended" >&2
kill $(jobs -p) 2>/dev/null || true
exit 1
