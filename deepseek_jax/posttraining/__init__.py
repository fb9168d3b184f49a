"""From a pre-trained model to one that reads long texts, answers and reasons (report sections 4.3 and 5)."""
