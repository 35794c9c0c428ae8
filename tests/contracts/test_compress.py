from pathlib import Path
import json, finetune
from finetune.compression import compress

def test_a(own_run, tmp_path):
    r = compress(own_run, max_drop=.9, sizes=["1x0.5", "2x1"])
    print(json.dumps(r, indent=1))
    assert 0
