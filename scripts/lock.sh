#!/bin/sh
# lock.sh: writes locks/core.txt and locks/dev.txt, exact versions of what abreast and its development
# need, with the hashes of all their files, for Python 3.10 and newer on any system: what
# constraints.txt pins, and the newest of the rest.
#
# Without torch and the CUDA packages that some of its builds bring: there is one torch for CPUs and
# one for each CUDA, from different indexes, and nobody can list the hashes of a build that only some
# can reach. Those are pinned by version in constraints.txt.
set -eu
PYTHON=${PYTHON:-python3}
UV=uv==0.13.9
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m pip install -q --no-compile --target "$work" "$UV"
echo 'torch; python_version < "0"' >"$work/without.txt"
# what torch itself needs, and what builds abreast
printf '%s\n' filelock fsspec jinja2 networkx setuptools sympy typing-extensions hatchling editables >"$work/more.in"
mkdir -p locks

# lock NAME OPTION...: one line per package
lock() {
    name=$1
    shift
    UV_PYTHON_DOWNLOADS=never "$work/bin/uv" pip compile -q pyproject.toml "$work/more.in" "$@" \
        --universal --python-version 3.10 --generate-hashes --no-annotate --no-header \
        --override "$work/without.txt" -c constraints.txt -o "$work/$name.txt"
    {
        echo "# Written by \`make lock\` (scripts/lock.sh). Do not edit."
        sed -e ':join' -e '/\\$/{N;s/ *\\\n */ /;b join' -e '}' "$work/$name.txt"
    } >"locks/$name.txt"
}

lock dev --extra dev
lock core -c locks/dev.txt
