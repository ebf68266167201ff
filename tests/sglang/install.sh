#!/usr/bin/env bash
# install.sh VENV SITE: SGLang's CPU path into VENV, this pyrlk alone into the folder SITE.
# SGLang pins another torch and the CUDA stack; neither is needed, so dependencies are listed here.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1 site=$2
torch=$(sed -n 's/^torch==//p' "$here/../../constraints.txt")
if [ ! -e "$venv/.ready" ] || [ "$here/requirements.lock" -nt "$venv/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q "torch==$torch" "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja
  "$venv/bin/pip" install -q --no-deps -r "$here/requirements.lock"
  "$venv/bin/pip" install -q --no-deps sglang==0.5.23
  touch "$venv/.ready"
fi
# In a folder of its own, it shadows nothing of the server's packages.
rm -rf "$site"
PATH=$(cd "$venv/bin" && pwd):$PATH "$venv/bin/pip" install -q --no-deps --no-build-isolation --target "$site" "$here/../.."
