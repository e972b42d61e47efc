#!/usr/bin/env bash
# Make .venv in the checkout from the packages of the image: .devcontainer/setup.sh
#
# The new .venv reads the locked packages of the image in place, through a .pth file, so that several GB are not
# installed twice. The installer then adds only what the image does not have: the packages for tests and linters.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
image=${IMAGE_VENV:-/opt/venv}
packages='import sysconfig; print(sysconfig.get_path("purelib"))'

# A .venv of the host machine is replaced, since its Python is not in the container.
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  "$image/bin/python" -m venv --clear .venv
  "$image/bin/python" -c "$packages" >"$(.venv/bin/python -c "$packages")/image.pth"
fi
"$image/bin/python" -m ktray.bootstrap --dev
# Commands of the image's packages, such as ray; those that .venv has itself stay.
for command in "$image"/bin/*; do
  [[ -e .venv/bin/${command##*/} ]] || ln -s "$command" .venv/bin/
done
