// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IWorkers} from "../src/interfaces/IWorkers.sol";
import {Fixture} from "./Fixture.sol";

contract WorkersTest is Fixture {
    address private constant PAYOUT = address(0x9999);

    function consent(uint256 key, address owner, uint256 nonce) private view returns (bytes memory) {
        return signed(key, workers.hotKeyDigest(owner, vm.addr(WORKER), PAYOUT, nonce, FOREVER));
    }

    function testFuzz_registerNeedsTheHotKey(uint256 key) public {
        key = within(key, 1, 2 ** 128);
        address hot = vm.addr(WORKER);
        bytes memory proof = consent(key, address(this), 0);
        if (key != WORKER) vm.expectRevert(abi.encodeWithSelector(IWorkers.Workers_BadSignature.selector, hot));
        workers.register(hot, PAYOUT, FOREVER, proof);
    }

    function testFuzz_aRetiredKeyStaysItsOwners(address thief) public {
        vm.assume(thief != address(this));
        address hot = vm.addr(WORKER);
        workers.register(hot, PAYOUT, FOREVER, consent(WORKER, address(this), 0));
        workers.revoke(hot);
        bytes memory proof = consent(WORKER, thief, 1);
        vm.prank(thief);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.Workers_HotKeyTaken.selector, hot, address(this)));
        workers.register(hot, PAYOUT, FOREVER, proof);
        require(workers.payoutOf(hot) == PAYOUT, "payout moved");
    }

    function testFuzz_onlyTheOwnerActs(address stranger) public {
        vm.assume(stranger != address(this));
        address hot = vm.addr(WORKER);
        workers.register(hot, PAYOUT, FOREVER, consent(WORKER, address(this), 0));
        bytes memory no = abi.encodeWithSelector(IWorkers.Workers_NotOwner.selector, hot, stranger);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.setPayout(hot, stranger);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.revoke(hot);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.rotate(hot, stranger, FOREVER, "");
    }

    function testFuzz_anUnknownKeyIsPaidItself(address hot) public view {
        require(workers.payoutOf(hot) == hot && workers.ownerOf(hot) == address(0), "unknown key");
    }
}
