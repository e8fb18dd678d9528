"""What is run in a checkout only: the ops as a folder of their own, and the table of versions."""
