"""Evaluation of a policy by a protocol, in a folder that goes on where it stopped, in as many processes as asked."""
