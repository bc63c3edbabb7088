"""The judge: LLaVA-OneVision with a reward head, from frames and instruction to success scores."""
