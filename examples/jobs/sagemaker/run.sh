set -e
[ -x /opt/optikit/venv/bin/optikit ] || { python3 -m venv /opt/optikit/venv && /opt/optikit/venv/bin/pip install --quiet optikit==0.1.0; }
exec /opt/optikit/venv/bin/optikit run /opt/ml/input/data/recipe/recipe.yaml --out /opt/ml/checkpoints/quickstart/out --progress plain
