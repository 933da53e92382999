"""What is in a data set, what is wrong with it, and which settings suit: tools/check_dataset.py."""
