#!/usr/bin/env bash
# Makes .venv ready for this checkout. The Makefile calls it before everything else; when nothing changed it is instant.
#
#   PYTHON=python3.12   the interpreter, 3.11 or 3.12; by default the first of python3, python3.12, python3.11 that is one
#   TORCH=2.11.0        any torch from 2.11 to 2.13
#
# pip's own settings are honoured. Without a GPU the CPU build of torch is enough, and several GB smaller: before the
# first set-up, point PIP_EXTRA_INDEX_URL (or PIP_INDEX_URL) at an index that holds CPU builds. Their version has a
# suffix (2.13.0+cpu), which pip ranks above the plain 2.13.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

TORCH=${TORCH:-2.13.0}
STAMP=.venv/robustscale.stamp

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() {
  printf '==> %s\n' "$*"
}

torchvision_for() {
  case $1 in
    2.11.*) echo 0.26.0 ;;
    2.12.*) echo 0.27.0 ;;
    2.13.*) echo 0.28.0 ;;
    *) die "TORCH=$1 is not supported; give a version from 2.11.0 to 2.13, as in TORCH=2.13.0" ;;
  esac
}

# Prints the path of the real interpreter: not a version manager's shim, nor one inside the .venv that is about to be rebuilt.
base_python() {
  "$1" -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) and print(sys._base_executable)' 2>/dev/null || true
}

find_python() {
  local candidate found
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    found=$(base_python "$candidate")
    [[ -z $found ]] || { echo "$found"; return; }
  done
  die "found no Python 3.11 or 3.12 (tried: ${PYTHON:-python3 python3.12 python3.11}); install one, or name it: make PYTHON=/path/to/python3.12 ..."
}

# What the project asks for, one requirement a line: the dependencies and every extra of pyproject.toml.
requirements() {
  "$python" - <<'PY'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra), sep="\n")
PY
}

# Debian's names of what is not there. It asks for the thing itself, so that any way of having installed it will do.
missing_packages() {
  local version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
  [[ -e $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] || echo "python$version-dev"
  command -v g++ >/dev/null || echo g++
  command -v pkg-config >/dev/null || echo pkg-config
  pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
  pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
  # opencv-python, which FFCV asks for, is the build with windows: without these two `import cv2` fails.
  "$python" -c 'import ctypes; ctypes.CDLL("libGL.so.1")' 2>/dev/null || echo libgl1
  "$python" -c 'import ctypes; ctypes.CDLL("libgthread-2.0.so.0")' 2>/dev/null || echo libglib2.0-0
}

install_system_packages() {
  local missing torn as_root=()
  mapfile -t missing < <(missing_packages)
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null ||
    die "the system lacks what Debian calls ${missing[*]}, and has no apt-get; install them with its package manager, then repeat this command"
  if ((EUID != 0)); then
    as_root=(sudo)
    sudo -n true 2>/dev/null || { [[ -t 0 ]] && command -v sudo >/dev/null && sudo -v; } ||
      die "the system lacks ${missing[*]}, and installing them needs root or sudo; have an administrator run 'apt-get install --no-install-recommends ${missing[*]}', then repeat this command"
  fi
  as_root+=(env DEBIAN_FRONTEND=noninteractive)
  say "installing from the system's packages: ${missing[*]}"
  # An install that was interrupted left packages unconfigured, or torn: apt-get refuses to work until both are mended.
  "${as_root[@]}" dpkg --configure -a || say "reinstalling what an interrupted install left torn"
  mapfile -t torn < <(dpkg-query --show --showformat '${db:Status-Eflag} ${binary:Package}\n' | sed -n 's/^reinstreq //p')
  "${as_root[@]}" apt-get update || say "apt-get update failed; going on with the package lists that are here"
  "${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 install -y --reinstall --no-install-recommends "${missing[@]}" "${torn[@]}" ||
    die "apt-get could not install ${missing[*]}; its own message above says why"
  mapfile -t missing < <(missing_packages)
  ((${#missing[@]} == 0)) || die "still missing after installing the system's packages: ${missing[*]}"
}

install_python_packages() {
  local pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input)
  local torch=("torch==$TORCH" "torchvision==$torchvision")
  rm -rf .venv # half made, or made for other pins
  "$python" -m venv .venv
  "${pip[@]}" install --quiet "$(grep '^pip==' constraints.txt)"
  local install=("${pip[@]}" install --constraint constraints.txt --build-constraint constraints.txt)
  say "installing torch $TORCH (the CUDA build is several GB)"
  "${install[@]}" "${torch[@]}"
  say "installing the rest; FFCV is compiled here"
  mapfile -t rest < <(requirements)
  "${install[@]}" "${torch[@]}" "${rest[@]}"
  .venv/bin/python -m pip check
  say "trying what was compiled here"
  .venv/bin/python -c 'import ffcv, ray, accelerate'
}

torchvision=$(torchvision_for "$TORCH")
python=$(find_python)
wanted=$({ echo "$python $TORCH"; "$python" -VV; requirements; cat constraints.txt; } | sha256sum)

exec 9<"${BASH_SOURCE[0]}" # the lock: this file itself
flock --nonblock 9 || { say "another set-up of this checkout is running; waiting for it"; flock 9; }
[[ ! -e $STAMP || $(<"$STAMP") != "$wanted" ]] || exit 0

started=$SECONDS
say "setting up .venv with $("$python" -V) (once; again only when the pins change)"
install_system_packages
install_python_packages
echo "$wanted" >"$STAMP" # last: whatever was interrupted before this is made anew
say "set up in $((SECONDS - started)) s"
