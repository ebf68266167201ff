#!/usr/bin/env bash
# install.sh VENV SITE: SGLang's CPU path into VENV, this pyrlk alone into the folder SITE.
# SGLang pins another torch and the CUDA stack; neither is needed, so dependencies are listed here.
# PYTHON (python3) builds pyrlk, so it needs the tools of `make setup`; VENV is made from it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$1 site=$2 python=${PYTHON:-python3}
torch=$(sed -n 's/^torch==//p' "$root/constraints.txt")
if [ ! -e "$venv/.ready" ] || [ "$here/requirements.lock" -nt "$venv/.ready" ]; then
  "$python" -m venv "$venv"
  # Modules are compiled when they are first imported: most never are.
  "$venv/bin/pip" install -q --no-compile -c "$here/requirements.lock" "torch==$torch"
  "$venv/bin/pip" install -q --no-compile --no-deps -r "$here/requirements.lock" sglang==0.5.23
  touch "$venv/.ready"
fi
# In a folder of its own, it shadows nothing of the server's packages.
rm -rf "$site" "$root"/build/lib*
"$python" -m pip install -q --no-deps --no-build-isolation --target "$site" "$root"
