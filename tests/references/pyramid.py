"""Parts that the references of the pyramid losses share: plain loops over nested lists of floats.

One image's feature map is x[d][i][j]; a batch is a list of those.
"""

import math


def size(x):
    return len(x), len(x[0]), len(x[0][0])


def conv2d(x, weight, bias):
    """Convolution with an odd kernel, stride 1 and zeros around the map."""
    depth, height, width = size(x)
    reach = len(weight[0][0]) // 2
    out = []
    for kernel, b in zip(weight, bias, strict=True):
        rows = []
        for i in range(height):
            row = []
            for j in range(width):
                total = b
                for d in range(depth):
                    for u in range(-reach, reach + 1):
                        for v in range(-reach, reach + 1):
                            if 0 <= i + u < height and 0 <= j + v < width:
                                total += kernel[d][u + reach][v + reach] * x[d][i + u][j + v]
                row.append(total)
            rows.append(row)
        out.append(rows)
    return out


def generate(x, block):
    """MGD's generator; `block` holds weight, bias, weight, bias."""
    first = conv2d(x, block[0], block[1])
    positive = [[[max(v, 0.0) for v in row] for row in plane] for plane in first]
    return conv2d(positive, block[2], block[3])


def softmax(values):
    top = max(values)
    e = [math.exp(v - top) for v in values]
    return [v / sum(e) for v in e]


def spatial_attention(x, temperature):
    """a[i][j] = H W softmax over places of the mean of |x| over channels."""
    depth, height, width = size(x)
    means = [sum(abs(x[d][i][j]) for d in range(depth)) / depth for i in range(height) for j in range(width)]
    flat = [height * width * v for v in softmax([m / temperature for m in means])]
    return [flat[i * width : (i + 1) * width] for i in range(height)]


def channel_attention(x, temperature):
    """a[d] = D softmax over channels of the mean of |x| over places."""
    depth, height, width = size(x)
    means = [sum(abs(v) for row in plane for v in row) / (height * width) for plane in x]
    return [depth * v for v in softmax([m / temperature for m in means])]


def keep(values, ratio):
    """0 for the int(ratio * L) largest of the values, 1 for the others."""
    order = sorted(range(len(values)), key=lambda k: (-values[k], k))
    dropped = set(order[: int(ratio * len(values))])
    return [0.0 if k in dropped else 1.0 for k in range(len(values))]


def times_places(x, mask):
    return [[[v * mask[i][j] for j, v in enumerate(row)] for i, row in enumerate(plane)] for plane in x]


def times_channels(x, mask):
    return [[[v * m for v in row] for row in plane] for plane, m in zip(x, mask, strict=True)]


def normalize(batch):
    """Each channel over images and places: (x - mean) / (unbiased std + 1e-6)."""
    depth, height, width = size(batch[0])
    out = [[[[0.0] * width for _ in range(height)] for _ in range(depth)] for _ in batch]
    for d in range(depth):
        values = [v for x in batch for row in x[d] for v in row]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
        for n, x in enumerate(batch):
            for i in range(height):
                for j in range(width):
                    out[n][d][i][j] = (x[d][i][j] - mean) / (std + 1e-6)
    return out


def squared_error(a, b):
    """Sum over images, channels and places."""
    return sum(
        (v - w) ** 2
        for x, y in zip(a, b, strict=True)
        for p, q in zip(x, y, strict=True)
        for r, s in zip(p, q, strict=True)
        for v, w in zip(r, s, strict=True)
    )


def count(batch):
    depth, height, width = size(batch[0])
    return len(batch) * depth * height * width


def cells(box, level_size, image_size):
    """First and last column and row of a box on a level, the last included."""
    (height, width), (image_height, image_width) = level_size, image_size
    x0, y0, x1, y1 = box
    return (
        math.floor(x0 * width / image_width),
        math.floor(y0 * height / image_height),
        math.ceil(x1 * width / image_width),
        math.ceil(y1 * height / image_height),
    )


def reconstruct(x, places, channels, part, spatial_ratio, channel_ratio):
    """The fused reconstruction under given attention; `part` holds "spatial", "channel" and "fusion", or fewer."""
    _, height, width = size(x)
    made = []
    if part.get("spatial") is not None:
        flat = keep([v for row in places for v in row], spatial_ratio)
        mask = [flat[i * width : (i + 1) * width] for i in range(height)]
        made.append(generate(times_places(x, mask), part["spatial"]))
    if part.get("channel") is not None:
        made.append(generate(times_channels(x, keep(channels, channel_ratio)), part["channel"]))
    if len(made) == 1:
        return made[0]
    a, b = softmax(part["fusion"])
    return [
        [[a * v + b * w for v, w in zip(r, s, strict=True)] for r, s in zip(p, q, strict=True)]
        for p, q in zip(*made, strict=True)
    ]
