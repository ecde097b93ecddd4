"""Images encoded as the records of a TFDS dataset: the same bytes every time, with their headers or pixels checked."""

import io
from typing import Any

import numpy as np
from PIL import Image

from badloss_jax.core.errors import DataError
from badloss_jax.data.archives import Collection, Example
from badloss_jax.data.pixels import check_header, decode_pixels, resize_pixels


class RecordEncoder:
    """Encodes the examples of one collection.

    Attributes:
      features: TFDS's description of a record.
    """

    def __init__(self, collection: Collection, size: int):
        """Describes the records.

        Args:
          collection: that the examples are of.
          size: store pixels, resized to this many a side; 0 stores image files as they are, and bare pixels, too.

        Raises:
          DataError: a class has a name that TFDS could not keep.
        """
        import tensorflow_datasets as tfds

        self._planes = collection.planes
        self._size = size

        if size:
            image = tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8, encoding="bytes")
        elif collection.planes:
            channels, height, width = collection.planes
            image = tfds.features.Tensor(shape=(height, width, channels), dtype=np.uint8, encoding="bytes")
        else:
            image = tfds.features.Image()

        for name in collection.class_names:
            if name != name.strip() or len(name.splitlines()) != 1:
                raise DataError(f"the class {name!r} cannot be kept: TFDS lists names one a line, stripped")
        label = tfds.features.ClassLabel(names=list(collection.class_names))

        self.features = tfds.features.FeaturesDict({"image": image, "label": label, "file_name": tfds.features.Text()})
        # Plain Python and protobuf: no TensorFlow.
        self._serializer = tfds.core.example_serializer.ExampleSerializer(self.features.get_serialized_info())

    def record(self, example: Example) -> bytes:
        """Returns the tf.train.Example of an image.

        Raises:
          DataError: the image cannot be read, or does not decode; it is named.
        """
        content = example.read()
        try:
            image = self._image(content)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise DataError(f"{example.name} in {example.file} does not decode: {error}") from error

        # A file's name may be of any bytes, which are kept as they are.
        encoded = self.features.encode_example(
            {
                "image": image,
                "label": example.label,
                "file_name": example.name.encode("utf-8", "surrogateescape"),
            }
        )
        return self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)

    def _image(self, content: bytes) -> Any:
        """Returns what is stored of an image: pixels, uint8 [H, W, C], or its file as it is."""
        if self._planes:
            pixels = np.frombuffer(content, np.uint8).reshape(self._planes).transpose(1, 2, 0)
            if self._size:
                return resize_pixels(Image.fromarray(np.ascontiguousarray(pixels)), self._size, 3)
            return pixels

        if self._size:
            return decode_pixels(io.BytesIO(content), self._size, 3)

        check_header(io.BytesIO(content))
        return content
