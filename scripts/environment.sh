# Sourced by the scripts beside it: `environment EXTRAS` makes .venv ready with these extras and puts it on PATH.

environment() {
    local extras=$1 root stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root" || exit 1
    if [ ! -x .venv/bin/python ]; then
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "phaseline needs Python 3.11 or newer as python3; found: $(python3 --version 2>&1)" >&2
            exit 1
        fi
        python3 -m venv .venv || exit 1
    fi
    # One stamp a set of extras: what was installed for the same files is not installed again.
    stamp=.venv/phaseline-${extras//,/-}
    if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
        echo "installing phaseline[$extras] into .venv" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" || exit 1
        touch "$stamp"
    fi
    PATH=$root/.venv/bin:$PATH
}

# The extras that tests and lint need. Two of them only where they can be installed; their tests skip elsewhere, and say so:
# crf compiles C++; server (Triton's wheel) needs numpy 1, which has no wheel for Python 3.13 and later.
test_extras() {
    local extras=cpu,export,sklearn,client,volumes,cluster,bench,test
    if command -v c++ >/dev/null; then
        extras+=,crf
    else
        echo "no C++ compiler: the tests of the extra crf will be skipped" >&2
    fi
    if python3 -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then
        extras+=,server
    else
        echo "Python 3.13 or later: the tests of the extra server will be skipped" >&2
    fi
    echo "$extras"
}
