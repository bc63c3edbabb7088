"""What is true of one robot, one file each, with its source."""
