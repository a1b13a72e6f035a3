"""The page at /ui/: HTML, CSS and ES modules as browsers take them, served by serving/pages.py; no build, no framework.

index.html, style.css, icon.svg    the frame; all else is drawn by scripts
start.js                           where a module does not come the page would stay empty: it is loaded anew, once
app.js                             addresses (#/calls?state=dead), navigation, login, what every view shares
dom.js                             the only place that makes elements; texts are data there, never markup
api.js                             requests, the password (in one variable, gone with the page), errors in words
live.js                            server-sent events, and polling where they fail
format.js, chart.js, parts.js      times and numbers; pictures; pieces that views share
views/*.js                         one module for each view
"""
