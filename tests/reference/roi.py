"""RoI pooling from the definition, in loops. Positions are computed in the dtype of the boxes, values in float64."""

import numpy as np

# Axes of samples.


def align_axis(low, high, bins, size, scale, sampling_ratio, aligned):
    """Of each bin along one axis of a RoI from `low` to `high`: (number of samples, positions of those on the map)."""
    dtype = low.dtype.type
    with np.errstate(all="ignore"):
        start = low * dtype(scale) - dtype(0.5 if aligned else 0)
        extent = high * dtype(scale) - dtype(0.5 if aligned else 0) - start
        if not aligned:
            extent = max(extent, dtype(1))
        if not (np.isfinite(start) and np.isfinite(extent)):
            return [(0, [])] * bins
        bin_size = extent / dtype(bins)
        samples = sampling_ratio if sampling_ratio > 0 else max(int(np.ceil(bin_size)), 0)
        axis = []
        for p in range(bins):
            steps = np.arange(samples).astype(dtype) + dtype(0.5)
            positions = start + dtype(p) * bin_size + steps * bin_size / dtype(samples)
            axis.append((samples, positions[(positions >= -1) & (positions <= size)]))
    return axis


def pixels_of(position, size):
    """The pixels that a sample reads along an axis, with their weights: {pixel: weight}."""
    if size == 0:
        return {}
    position = max(position, type(position)(0))
    low = int(position)
    if low >= size - 1:
        return {size - 1: 1.0}
    fraction = float(position - type(position)(low))
    return {low: 1 - fraction, low + 1: fraction}


def image_of(index, images):
    return int(index) if -1 < index < images else None


def align_samples(roi, map_size, output_size, scale, sampling_ratio, aligned):
    """Of each bin [bins_y][bins_x] of a RoI [x1, y1, x2, y2]: (number of samples, positions (y, x) on the map).

    None has a sample where a coordinate is not finite.
    """
    along_y = align_axis(roi[1], roi[3], output_size[0], map_size[0], scale, sampling_ratio, aligned)
    along_x = align_axis(roi[0], roi[2], output_size[1], map_size[1], scale, sampling_ratio, aligned)
    if not np.isfinite(roi).all():
        along_y = [(0, [])] * output_size[0]
    return [[(n * m, [(y, x) for y in ys for x in xs]) for m, xs in along_x] for n, ys in along_y]


# Averages, as taps (k, p, q, image, row, column, weight): what each bin (p, q) of RoI k adds up.


def sample_taps(y, x, weight, map_size):
    """(row, column, weight) of the pixels of a sample. Pixels of weight 0 do not count, whatever they hold."""
    for row, row_weight in pixels_of(y, map_size[0]).items():
        for column, column_weight in pixels_of(x, map_size[1]).items():
            if row_weight * column_weight != 0:
                yield row, column, row_weight * column_weight * weight


def align_taps(boxes, shape, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    for k, (index, *roi) in enumerate(boxes):
        image = image_of(index, shape[0])
        if image is None:
            continue
        bins = align_samples(np.array(roi), shape[2:], output_size, spatial_scale, sampling_ratio, aligned)
        for p, q in np.ndindex(*output_size):
            count, positions = bins[p][q]
            for y, x in positions:
                for tap in sample_taps(y, x, 1 / count, shape[2:]):
                    yield k, p, q, image, *tap


def ps_pool_taps(boxes, shape, output_size, spatial_scale=1.0):
    for k, (index, *roi) in enumerate(boxes):
        image = image_of(index, shape[0])
        if image is None or not np.isfinite(roi).all():
            continue
        rows = pool_axis(roi[1], roi[3], output_size[0], shape[2] - 1, spatial_scale, 0)
        columns = pool_axis(roi[0], roi[2], output_size[1], shape[3] - 1, spatial_scale, 0)
        for p, q in np.ndindex(*output_size):
            pixels = [(row, column) for row in rows[p] for column in columns[q]]
            for row, column in pixels:
                yield k, p, q, image, row, column, 1 / len(pixels)


def rotated_taps(boxes, shape, output_size, spatial_scale=1.0, sampling_ratio=-1):
    """boxes [K, 6]: batch index, cx, cy, w, h and degrees, counter-clockwise as one looks at the image."""
    dtype = boxes.dtype.type
    for k, row in enumerate(boxes):
        image = image_of(row[0], shape[0])
        if image is None or not np.isfinite(row).all():
            continue
        cx, cy, width, height = row[1:5] * dtype(spatial_scale)
        turn = np.deg2rad(np.fmod(np.float64(row[5]), 360))
        cos, sin = dtype(np.cos(turn)), dtype(np.sin(turn))
        grids = []
        for side, bins in ((height, output_size[0]), (width, output_size[1])):
            size = side / dtype(bins)
            count = sampling_ratio if sampling_ratio > 0 else max(int(np.ceil(size)), 0)
            steps = np.arange(count).astype(dtype) + dtype(0.5)
            grids.append([-side / dtype(2) + dtype(p) * size + steps * size / dtype(count) for p in range(bins)])
        for p, q in np.ndindex(*output_size):
            for v in grids[0][p]:
                for u in grids[1][q]:
                    y, x = v * cos - u * sin + (cy - dtype(0.5)), v * sin + u * cos + (cx - dtype(0.5))
                    if -1 <= y <= shape[2] and -1 <= x <= shape[3]:
                        share = 1 / (len(grids[0][p]) * len(grids[1][q]))
                        for tap in sample_taps(y, x, share, shape[2:]):
                            yield k, p, q, image, *tap


def channels_of(position_sensitive, p, q, output_size):
    """The channels of the input that a bin reads."""
    if not position_sensitive:
        return slice(None)
    return slice(p * output_size[1] + q, None, output_size[0] * output_size[1])


def gather(taps, input, count, output_size, position_sensitive=False):
    """[count, C, *output_size]: what the taps add up."""
    channels = input.shape[1] // (np.prod(output_size) if position_sensitive else 1)
    out = np.zeros((count, channels, *output_size))
    for k, p, q, image, row, column, weight in taps:
        out[k, :, p, q] += weight * input[image, channels_of(position_sensitive, p, q, output_size), row, column]
    return out


def spread(taps, grad, shape, position_sensitive=False):
    """The gradient to an input of that shape, given the one to the result."""
    out = np.zeros(shape)
    for k, p, q, image, row, column, weight in taps:
        out[image, channels_of(position_sensitive, p, q, grad.shape[2:]), row, column] += weight * grad[k, :, p, q]
    return out


def roi_align(input, boxes, output_size, *options):
    """[K, C, *output_size] for input [N, C, H, W] and boxes [K, 5]; zeros for images that do not exist."""
    return gather(align_taps(boxes, input.shape, output_size, *options), input, len(boxes), output_size)


def roi_align_gradient(grad, boxes, shape, *options):
    return spread(align_taps(boxes, shape, grad.shape[2:], *options), grad, shape)


def roi_align_rotated(input, boxes, output_size, *options):
    return gather(rotated_taps(boxes, input.shape, output_size, *options), input, len(boxes), output_size)


def roi_align_rotated_gradient(grad, boxes, shape, *options):
    return spread(rotated_taps(boxes, shape, grad.shape[2:], *options), grad, shape)


def ps_roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1):
    taps = align_taps(boxes, input.shape, output_size, spatial_scale, sampling_ratio, True)
    return gather(taps, input, len(boxes), output_size, position_sensitive=True)


def ps_roi_align_gradient(grad, boxes, shape, spatial_scale=1.0, sampling_ratio=-1):
    taps = align_taps(boxes, shape, grad.shape[2:], spatial_scale, sampling_ratio, True)
    return spread(taps, grad, shape, position_sensitive=True)


def ps_roi_pool(input, boxes, output_size, *options):
    taps = ps_pool_taps(boxes, input.shape, output_size, *options)
    return gather(taps, input, len(boxes), output_size, position_sensitive=True)


def ps_roi_pool_gradient(grad, boxes, shape, *options):
    return spread(ps_pool_taps(boxes, shape, grad.shape[2:], *options), grad, shape, position_sensitive=True)


# Maxima.


def pool_axis(low, high, bins, end, scale, inclusive):
    """The pixels of each bin along one axis, below `end`."""
    dtype = type(low)
    start, stop = half_away(low * dtype(scale)), half_away(high * dtype(scale))
    size = dtype(max(stop - start + inclusive, 1)) / dtype(bins)
    ranges = [(np.floor(dtype(p) * size), np.ceil(dtype(p + 1) * size)) for p in range(bins)]
    return [range(*(int(np.clip(float(start) + float(edge), 0, max(end, 0))) for edge in pair)) for pair in ranges]


def half_away(value):
    """Rounded to a whole number, halves away from 0."""
    whole = np.trunc(float(value))
    return whole + np.sign(value) if abs(float(value) - whole) >= 0.5 else whole


def first_largest(values):
    """The number of the winner: the first NaN, else the first of the largest."""
    for i, value in enumerate(values):
        if np.isnan(value):
            return i
    return int(np.argmax(values))


def roi_pool(input, boxes, output_size, spatial_scale=1.0, grad=None):
    """[K, C, *output_size], or the gradient to the input given that to the result."""
    out = np.zeros((len(boxes), input.shape[1], *output_size))
    input_grad = np.zeros(input.shape)
    for k, (index, *roi) in enumerate(boxes):
        image = image_of(index, len(input))
        if image is None or not np.isfinite(roi).all():
            continue
        rows = pool_axis(roi[1], roi[3], output_size[0], input.shape[2], spatial_scale, 1)
        columns = pool_axis(roi[0], roi[2], output_size[1], input.shape[3], spatial_scale, 1)
        for p, q in np.ndindex(*output_size):
            pixels = [(row, column) for row in rows[p] for column in columns[q]]
            for c in range(input.shape[1] if pixels else 0):
                row, column = pixels[first_largest([input[image, c, y, x] for y, x in pixels])]
                out[k, c, p, q] = input[image, c, row, column]
                if grad is not None:
                    input_grad[image, c, row, column] += grad[k, c, p, q]
    return out if grad is None else input_grad


def roi_align_max(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False, grad=None):
    """The largest sample of each bin, those off the map, behind the others, being 0; or the gradient."""
    out = np.zeros((len(boxes), input.shape[1], *output_size))
    input_grad = np.zeros(input.shape)
    for k, (index, *roi) in enumerate(boxes):
        image = image_of(index, len(input))
        if image is None:
            continue
        bins = align_samples(np.array(roi), input.shape[2:], output_size, spatial_scale, sampling_ratio, aligned)
        for p, q in np.ndindex(*output_size):
            count, positions = bins[p][q]
            samples = [list(sample_taps(y, x, 1.0, input.shape[2:])) for y, x in positions]
            samples += [[]] if count > len(samples) else []
            for c in range(input.shape[1] if samples else 0):
                values = [sum(weight * input[image, c, y, x] for y, x, weight in taps) for taps in samples]
                winner = first_largest(values)
                out[k, c, p, q] = values[winner]
                for y, x, weight in samples[winner] if grad is not None else []:
                    input_grad[image, c, y, x] += weight * grad[k, c, p, q]
    return out if grad is None else input_grad


# Several levels.


def level_of(roi, spatial_scales, canonical_scale=224, canonical_level=4):
    """The FPN paper's formula, with torchvision's margin, in the dtype of the boxes."""
    dtype = roi.dtype.type
    area = (roi[2] - roi[0]) * (roi[3] - roi[1])
    if not area > 0:
        return 0
    level = np.floor(dtype(canonical_level) + np.log2(np.sqrt(area) / dtype(canonical_scale)) + dtype(1e-6))
    return int(np.clip(level + np.log2(spatial_scales[0]), 0, len(spatial_scales) - 1))


def multi_scale_roi_align(features, boxes, output_size, spatial_scales, sampling_ratio=-1, aligned=False, **canonical):
    """[K, C, *output_size] for a list of maps [N, C, H, W]."""
    out = np.zeros((len(boxes), features[0].shape[1], *output_size))
    for k, row in enumerate(boxes):
        level = level_of(row[1:], spatial_scales, **canonical) if np.isfinite(row).all() else 0
        out[k] = roi_align(
            features[level], boxes[k : k + 1], output_size, spatial_scales[level], sampling_ratio, aligned
        )[0]
    return out
