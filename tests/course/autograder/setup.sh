#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image. The project is then in /autograder/source.
set -euo pipefail
cd "$(dirname "$0")/.."
apt-get update
apt-get install -y python3-venv
python3 -m venv venv
# The CPU build first, because the ordinary one brings gigabytes of CUDA.
venv/bin/pip install "$(grep '^torch==' source/requirements.txt)" --index-url https://download.pytorch.org/whl/cpu
venv/bin/pip install -r source/requirements.txt
