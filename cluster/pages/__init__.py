"""The local pages: judging and sampling, one app on loopback, off unless `glidepath page` starts it."""
