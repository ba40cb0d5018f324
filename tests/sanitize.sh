#!/usr/bin/env bash
# csrc/ under the sanitizers: addresses and undefined behaviour in one build, threads in another. What needs no GPU runs
# on them: the bindings against the stand-in for NCCL, which is built alike, and the CPU references of the kernels.
# Makes the environment, asks nothing. Arguments go to pytest:   bash tests/sanitize.sh -k abort
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment test,check
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
suffix=$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
includes="-I$(python -c 'import sysconfig; print(sysconfig.get_path("include"))') -I$(python -c 'import pybind11; print(pybind11.get_include())')"

run() {  # NAME LIBRARIES FLAGS TESTS...: the tests on a copy of bmtrain with an extension built with FLAGS
    local name=$1 libraries=$2 flags=$3
    shift 3
    printf '\n== %s\n' "$name"
    mkdir "$folder/$name"
    cp -r bmtrain tests "$folder/$name"
    rm -f "$folder/$name/bmtrain/"_C*.so
    printf '%s\n' csrc/module.cpp csrc/nccl/*.cpp csrc/cpu/*.cpp | xargs -P 2 -I {} sh -c \
        "g++ -c -std=c++17 -Wall -Wextra -fPIC -fvisibility=hidden $flags $includes {} -o '$folder/$name/'\$(basename {}).o"
    g++ -shared $flags "$folder/$name"/*.o -ldl -o "$folder/$name/bmtrain/_C$suffix"
    local preload=
    for library in $libraries; do preload="$preload $(g++ -print-file-name="$library")"; done
    # The interpreter has no sanitizer in it, and what it never frees is not ours: leaks are not counted.
    (cd "$folder/$name" && PYTHONPATH=$PWD CXXFLAGS=$flags LD_PRELOAD=${preload# } \
        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
        python -m pytest -q -p no:cacheprovider -c /dev/null --rootdir . "$@" </dev/null)
}

bindings=tests/kernels/test_nccl_bindings.py
references=$(grep -l importorskip.*_C tests/kernels/test_*.py | grep -v "$bindings")
run addresses-and-undefined "libasan.so libubsan.so" \
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" $bindings $references "$@"
run threads libtsan.so "-O1 -g -fsanitize=thread" $bindings "$@"
