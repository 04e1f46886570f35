"""What users call: image reading, classical features, classifiers, recipes, segmentation, the command line."""
