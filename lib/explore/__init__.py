"""The explorers, the one part of `lib` that knows widgets.

explorer        the frame of each: controls, buttons, a picture, Save
controls        sliders, menus and fields
live            runs that advance by themselves
frames          pictures that are brought up to date several times a second
depth           networks of growing depth, trained in front of you (by depth_training)
weights         trained networks, entry by entry
blocks          residual blocks of several depths, trained live
figure          the one at the end of each figure's notebook
"""
