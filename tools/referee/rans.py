"""The referee's own reader of the coded numbers in a model.bin of version 2, shared with no script that is judged.

A number's class is the sum of a byte of its row and one of its column, kept in 0 to 40; each class has 256 frequencies
that add up to 2**14. The stream is a 32-bit state for each of a number of coders, which take turns, and 16-bit words.
"""

import math

import numpy as np

CLASSES, TOTAL, LEAST = 41, 1 << 14, 1 << 16
TABLE_BYTES = 2 * 256 * CLASSES
EMPTY = LEAST.to_bytes(4, "little")  # the stream of no numbers
MAX_NUMBERS = 1 << 28


def read_coded(data: bytes, stream: bytes, shapes: list[list[int]]) -> tuple[list[bytes], int]:
    """(the numbers of each coded matrix, the bytes of data that tell how to read them); ValueError if it is damaged."""
    sizes = [(math.prod(shape[:-1]), shape[-1]) for shape in shapes]
    if sum(rows * columns for rows, columns in sizes) > MAX_NUMBERS:
        raise ValueError(f"there are more than {MAX_NUMBERS:,} coded numbers")
    position = TABLE_BYTES + sum(rows + columns for rows, columns in sizes)
    if min(map(min, sizes), default=0) < 0 or position > len(data):
        raise ValueError("the tables of the coded numbers are cut short")
    low, high = np.frombuffer(data, np.uint8, TABLE_BYTES).reshape(2, CLASSES, 256).astype(np.int64)
    bytes_of, classes, at = np.frombuffer(data, np.int8), [], TABLE_BYTES
    for rows, columns in sizes:
        of_row, of_column = bytes_of[at : at + rows].astype(np.int16), bytes_of[at + rows : at + rows + columns]
        classes.append(np.clip(of_row[:, None] + of_column, 0, CLASSES - 1).astype(np.uint8).reshape(-1))
        at += rows + columns
    numbers = decode(np.concatenate(classes) if classes else np.empty(0, np.uint8), low + 256 * high, stream)
    ends = np.cumsum([rows * columns for rows, columns in sizes]).tolist()
    return [numbers[begin:end].tobytes() for begin, end in zip([0, *ends], ends, strict=False)], position


def decode(classes: np.ndarray, frequencies: np.ndarray, stream: bytes) -> np.ndarray:
    """The coded bytes, one for each class in the list."""
    coders = 1 + min(1023, len(classes) // 8192)
    whole = frequencies.sum(axis=1) == TOTAL
    if (frequencies.sum(axis=1)[~whole] != 0).any() or not whole[np.flatnonzero(np.bincount(classes))].all():
        raise ValueError("the frequencies of the coded numbers do not add up")
    if len(stream) < 4 * coders or len(stream) % 2:
        raise ValueError("the coded numbers are cut short")
    # For each slot of each class: which byte it means, how wide that byte's slots are, and the slot's place in them.
    meaning, width, place = (np.zeros((CLASSES, TOTAL), np.uint32) for _ in range(3))
    for number in np.flatnonzero(whole):
        share = frequencies[number]
        meaning[number] = np.repeat(np.arange(256), share)
        width[number] = np.repeat(share, share)
        place[number] = np.arange(TOTAL) - np.repeat(np.cumsum(share) - share, share)
    state, words = np.frombuffer(stream, "<u4", coders).copy(), np.frombuffer(stream, "<u2", offset=4 * coders)
    numbers = np.empty(len(classes), np.uint8)
    for begin in range(0, len(classes), coders):
        turn = classes[begin : begin + coders]
        now = state[: len(turn)]
        cell = turn, now % TOTAL
        numbers[begin : begin + coders] = meaning[cell]
        now[:] = width[cell] * (now // TOTAL) + place[cell]
        short = np.flatnonzero(now < LEAST)
        if len(short) > len(words):
            raise ValueError("the coded numbers end early")
        now[short] = now[short] * LEAST + words[: len(short)]
        words = words[len(short) :]
    if len(words) or (state != LEAST).any():
        raise ValueError("the coded numbers do not end where they should")
    return numbers
