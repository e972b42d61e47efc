"""Large JPEGs at a reduced size, as INDEX decodes them, against whole ones: milliseconds, and cosines of embeddings.

    python tests/scale/large_photos.py WEIGHTS PHOTO [PHOTO ...]

WEIGHTS is a safetensors file of timm's ``tf_efficientnet_lite0``. Each photo is enlarged to 3,000 pixels on its shorter
side. One core, some seconds a photo.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from ktray.data.decode import decode_rgb  # noqa: E402
from ktray.data.preprocess import Ample, Preprocess  # noqa: E402

SIDE = 3000


def enlarged(path: str) -> bytes:
    image = Image.fromarray(decode_rgb(Path(path).read_bytes()))
    factor = SIDE / min(image.size)
    large = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    return simplejpeg.encode_jpeg(np.asarray(large), quality=90)


def main(weights: str, photos: list[str]) -> None:
    torch.set_num_threads(1)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    model.load_state_dict(load_file(weights))
    model.reset_classifier(0)
    model.eval()
    expects, cosines, seconds = Preprocess.from_timm(model), [], np.zeros(2)
    for data in map(enlarged, photos):
        pixels = []
        for way, enough in enumerate((None, Ample())):
            began = time.perf_counter()
            image = decode_rgb(data, enough=enough)
            pixels.append(expects.eval_transform(image, enough.whole if enough else None))
            seconds[way] += time.perf_counter() - began
        with torch.inference_mode():
            whole, reduced = model(expects.normalise(torch.from_numpy(np.stack(pixels))))
        cosines.append(float(F.cosine_similarity(whole, reduced, dim=0)))
    whole_ms, reduced_ms = (1000 * seconds / len(photos)).tolist()
    print(f"{len(photos)} photos: {whole_ms:.0f} ms whole, {reduced_ms:.0f} ms reduced")
    print(f"cosine: {np.mean(cosines):.4f} on average, {min(cosines):.4f} at least")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
