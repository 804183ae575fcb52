"""Speed, measured: what Lockstep and its peers do in the same run on the same machine. No part of the trainer."""
