#!/usr/bin/env bash
# Everything that only a CUDA machine can tell, part by part; what is done is not done again.
#   tools/gpu_check.sh                     all parts: parity kernels archs step run
#   tools/gpu_check.sh parity step         these
#   DATA_PATH=data/datasets/NAME tools/gpu_check.sh archs run     these are called again until they have ended
# It wants PyTorch with CUDA and Triton, and from WHEELS (a folder of wheels) or PyPI what else requirements.txt names
# for the run. Each part ends within eight minutes. Results: records/benchmarks/gpu_check_<part>_<machine>.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c "import torch" 2>/dev/null; then
    echo "error: $python has no PyTorch; name one that has in PYTHON" >&2
    exit 2
fi
source=(); [ -z "${WHEELS:-}" ] || source=(--no-index --find-links "$WHEELS")
install() { "$python" -m pip install --quiet --disable-pip-version-check "${source[@]}" "$@"; }
for package in numpy zstandard sentencepiece; do
    "$python" -c "import $package" 2>/dev/null || install "$package" ||
        echo "$package cannot be installed, and parts that need it fail; put its wheel into a folder named in WHEELS" >&2
done
# Its scan stands beside ours; without it that row is left out.
if "$python" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null && ! "$python" -c "import fla" 2>/dev/null; then
    install fla-core einops || echo "fla-core cannot be installed: its scan is left out" >&2
fi
exec "$python" -m tools.gpu_check "$@"
