"""Studies of data and labels: which of two label sets is better, how blurred one domain is against another."""
