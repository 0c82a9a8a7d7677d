"""Control signals: what a video shows, without how it looks (arXiv 2511.00062; specification of Transfer, section 2).

Four kinds, each a video of the size, length and frame rate of the one that it was made of: `edge` (Canny), `blur` (the
published name is `vis`), `depth` (near is bright) and `seg` (a colour an object). `signals` makes and reads them,
`masks` says where in space and time each counts.
"""
