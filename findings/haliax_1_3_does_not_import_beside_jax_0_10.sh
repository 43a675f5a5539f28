#!/usr/bin/env bash
# haliax 1.3, the newest release: `import haliax` fails beside jax 0.10.2, which its requirements allow, since a class that it takes from
# JAX's tree utilities is not there. So `pip install haliax` gives a package that cannot be used.
# Guess written down before the run: what pip resolves together imports.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet haliax==1.3 jax==0.10.2
echo "version: haliax 1.3, jax 0.10.2"
echo "expected: imported"
seen=$("$folder/venv/bin/python" -c '
try:
    import haliax
except ImportError as error:
    print("ImportError:", str(error).partition(" (")[0])
else:
    print("imported")' 2>/dev/null)
echo "seen: $seen"
[[ $seen == "ImportError: cannot import name "* ]]
