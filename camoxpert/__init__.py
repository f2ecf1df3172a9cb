"""CamoXpert: mixture-of-experts segmentation of camouflaged objects."""
