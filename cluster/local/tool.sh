# For the other scripts here: $tool, `compose`, and `in_head` to run a command in the head's container.
if docker compose version >/dev/null 2>&1; then
  tool=docker
  compose() { docker compose --project-directory "$here" --file "$here/compose.yaml" "$@"; }
elif command -v podman-compose >/dev/null; then
  tool=podman
  compose() { (cd "$here" && podman-compose --file compose.yaml "$@"); }
else
  echo "neither 'docker compose' nor podman-compose is installed" >&2
  exit 1
fi
in_head() { compose exec -T head "$@"; }
