#!/usr/bin/env bash
# Trains a language model on this machine under a time cap, stores and scores it, files a record of it and checks that.
#
#   ./run.sh                                     ARCH=gpt on the demo corpus: all GPUs, or a small preset on the CPU
#   ARCH=gpt MAX_WALLCLOCK_SECONDS=60 ./run.sh   every setting of train_gpt.py can be given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/environment.sh

export ARCH=${ARCH:-gpt}
if [ -z "${DATA_PATH:-}" ]; then
    python data/prepare.py
    export DATA_PATH=data/datasets/pydocs_sp1024
fi

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    launch=(torchrun --standalone "--nproc_per_node=$gpus")
    preset=()
else
    launch=(python)
    preset=(NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=8192
        MAX_WALLCLOCK_SECONDS=120 WARMUP_STEPS=3 MUON_MOMENTUM_WARMUP_STEPS=100 TRAIN_LOG_EVERY=20)
fi

demo=demo_${ARCH}_$(date +%Y%m%d-%H%M%S)  # a folder of its own: runs of one setting beside each other are one record
export OUT_DIR=${OUT_DIR:-runs/$demo}
export RUN_ID=${RUN_ID:-seed${SEED:-1337}}
folder=$OUT_DIR/$RUN_ID
python -m tools.pack "$ARCH" ${preset[@]+"${preset[@]}"} --from-env -o "$folder/train_gpt.py"
"${launch[@]}" "$folder/train_gpt.py"

python -m tools.record "$folder" --script "$folder/train_gpt.py" --name "$(tr '[:upper:]' '[:lower:]' <<<"$demo")" \
    --author "${USER:-me}" --github-id "${USER:-me}" --blurb "A run of ./run.sh." --out "$OUT_DIR/records"
record=$(ls -d "$OUT_DIR"/records/*/*)
python -m tools.verify "$record" --data "$DATA_PATH" || [ $? -eq 3 ]  # 3: nothing failed, but one seed proves little

echo
grep -h final_ "$folder/train.log" | tail -n 1
echo "log and artifact: $folder    record: $record"
