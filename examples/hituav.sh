#!/bin/sh
# Train and compare the three HIT-UAV cards with two seeds, as in docs/hituav.md. Run it again after an interruption:
# finished runs are left alone, the others go on from their newest checkpoint.
#
#   sh examples/hituav.sh HIT_UAV runs/hituav [OPTIONS OF querydet train]
#
# HIT_UAV: folder with instances_train.json, instances_val.json, train/ and val/ (CC BY 4.0).
# On a GPU, for example, larger batches: sh examples/hituav.sh HIT_UAV runs/hituav --train.batch-size 32 --data.threads 16
set -e
if [ $# -lt 2 ]; then
    echo "usage: sh examples/hituav.sh HIT_UAV RUNS [OPTIONS OF querydet train]" >&2
    exit 2
fi
data=$1 runs=$2
shift 2
for seed in 0 1; do
    for card in hituav_querydet hituav_retinanet hituav_highres; do
        run=$runs/$card-$seed
        resume=
        [ -d "$run/checkpoints" ] && resume=--resume
        python train.py $card --data.root "$data" --run "$run" --train.seed $seed $resume "$@"
        [ -f "$run/report.json" ] || python eval.py "$run"
    done
    python benchmark.py table3 --out "$runs/table3-$seed" \
        --runs "$runs/hituav_retinanet-$seed" "$runs/hituav_highres-$seed" "$runs/hituav_querydet-$seed"
done
