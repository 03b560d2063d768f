#!/bin/sh
# The S3 server of compose and of Kubernetes' dev overlay: JuiceFS's gateway as infra/local starts it, with its buckets.
# The keys come from MINIO_ROOT_USER and MINIO_ROOT_PASSWORD; data lies in $DATA, and $LISTEN is where it answers.
set -eu
: "${DATA:=/data}" "${LISTEN:=0.0.0.0:9000}" "${BUCKETS:=cxr mlflow}"
META="sqlite3://$DATA/meta.db"
export META HOME="$DATA"

mkdir -p "$DATA/blocks" "$DATA/empty"
juicefs format --no-update --storage=file "--bucket=$DATA/blocks/" --trash-days=0 "$META" cxr
for bucket in $BUCKETS; do # a bucket is a folder of the volume, which needs no running server and no client of its own
    juicefs sync --dirs "$DATA/empty/" "jfs://META/$bucket/"
done
exec juicefs --no-agent gateway --multi-buckets --keep-etag --no-banner --no-usage-report \
    --metrics=127.0.0.1:0 "--cache-dir=$DATA/cache" "$META" "$LISTEN"
