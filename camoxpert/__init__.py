"""CamoXpert: mixture-of-experts segmentation of camouflaged objects."""

import os

# The second line behind data.max_pixels, which is checked from the header by another decoder.
# OpenCV reads it when it is loaded, and several parts load OpenCV: so it stands here.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "200000000")
