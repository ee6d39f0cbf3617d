#!/usr/bin/env bash
# spot_notice.sh aws|gcp: wait for the cloud's notice that it takes this node, and tell Ray, which tells the run in time.
# METADATA is the metadata server, for tests.
set -euo pipefail

aws() { # two minutes' notice
    local server=${METADATA:-http://169.254.169.254} token
    token=$(curl -sf -m 2 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$server/latest/api/token") &&
        curl -sf -m 2 -H "X-aws-ec2-metadata-token: $token" "$server/latest/meta-data/spot/instance-action" > /dev/null
}

gcp() { # half a minute's notice
    local server=${METADATA:-http://metadata.google.internal}
    [ "$(curl -sf -m 2 -H "Metadata-Flavor: Google" "$server/computeMetadata/v1/instance/preempted")" = TRUE ]
}

case "${1:-}" in
    aws) seconds=110 ;;
    gcp) seconds=25 ;;
    *) echo "usage: spot_notice.sh aws|gcp" >&2 && exit 2 ;;
esac
until "$1"; do sleep 2; done
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the cloud takes this node" \
    --deadline-remaining-seconds "$seconds"
