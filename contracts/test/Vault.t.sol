// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Vault} from "../src/Vault.sol";
import {IVault} from "../src/interfaces/IVault.sol";
import {Fixture} from "./Fixture.sol";

contract VaultTest is Fixture {
    function testFuzz_depositCreditsTheBeneficiary(uint256 amount, address to) public {
        amount = within(amount, 1, type(uint128).max);
        vm.assume(to != address(0) && to != vm.addr(PAYER));
        token.mint(address(this), amount);
        token.approve(address(vault), amount);
        same(vault.deposit(address(token), amount, to), amount, "credited");
        same(balance(to), amount, "balance");
        same(vault.liabilities(address(token)), PURSE + amount, "I1");
    }

    function testFuzz_nativeDepositTakesExactlyItsValue(uint256 amount, uint256 value) public {
        amount = within(amount, 1, 1 ether);
        value = within(value, 0, 1 ether);
        vm.deal(address(this), value);
        if (amount != value) vm.expectRevert(abi.encodeWithSelector(IVault.Vault_WrongValue.selector, amount, value));
        vault.deposit{value: value}(address(0), amount, address(this));
    }

    function testFuzz_withdrawNeverPaysMoreThanTheBalance(uint256 amount) public {
        address payer = vm.addr(PAYER);
        vm.prank(payer);
        if (amount == 0) {
            vm.expectRevert(abi.encodeWithSelector(IVault.Vault_ZeroAmount.selector));
        } else if (amount > PURSE) {
            vm.expectRevert(
                abi.encodeWithSelector(IVault.Vault_Insufficient.selector, address(token), payer, PURSE, amount)
            );
        }
        vault.withdraw(address(token), amount, vm.addr(MALLORY));
        bool paid = amount > 0 && amount <= PURSE;
        same(token.balanceOf(vm.addr(MALLORY)), paid ? amount : 0, "paid");
        same(balance(payer), paid ? PURSE - amount : PURSE, "left");
    }

    function testFuzz_strangersMoveNothing(address stranger, uint256 amount) public {
        vm.assume(!vault.isModule(stranger));
        bytes memory no = abi.encodeWithSelector(IVault.Vault_NotModule.selector, stranger);
        vm.prank(stranger);
        vm.expectRevert(no);
        vault.lock(address(token), vm.addr(PAYER), amount);
        vm.prank(stranger);
        vm.expectRevert(no);
        vault.lockBond(address(token), vm.addr(PAYER), amount);
        vm.prank(stranger);
        vm.expectRevert(no);
        vault.release(address(token), stranger, amount);
    }

    function testFuzz_aModuleReleasesOnlyItsOwnLock(uint128 locked, uint256 wanted) public {
        locked = uint128(within(locked, 1, PURSE));
        vm.assume(wanted > locked);
        vm.prank(address(channels));
        vault.lock(address(token), vm.addr(PAYER), locked);
        vm.prank(address(channels));
        vm.expectRevert(
            abi.encodeWithSelector(
                IVault.Vault_ReleaseExceedsLocked.selector, address(channels), address(token), locked, wanted
            )
        );
        vault.release(address(token), vm.addr(MALLORY), wanted);
    }

    function testFuzz_aPermitPullsOnlyFromItsSender(uint256 amount, uint256 submitter) public {
        (amount, submitter) = (within(amount, 1, type(uint128).max), submitter % 2 == 0 ? PAYER : MALLORY);
        (address from, address who) = (vm.addr(PAYER), vm.addr(submitter));
        token.mint(from, amount);
        bytes32 permit = keccak256(
            abi.encode(
                keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"),
                from,
                address(vault),
                amount,
                0,
                FOREVER
            )
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(PAYER, _typed(permit));
        if (submitter != PAYER) {
            vm.expectRevert(
                abi.encodeWithSignature("ERC20InsufficientAllowance(address,uint256,uint256)", address(vault), 0, amount)
            );
        }
        vm.prank(who);
        vault.depositWithPermit(address(token), amount, vm.addr(MALLORY), FOREVER, v, r, s);
        same(balance(vm.addr(MALLORY)), submitter == PAYER ? amount : 0, "credited");
        same(token.balanceOf(from), submitter == PAYER ? 0 : amount, "coins");
    }

    function testFuzz_anAuthorizationCreditsItsSignerOnce(uint256 amount, address submitter, bytes32 nonce) public {
        amount = within(amount, 1, type(uint128).max);
        address from = vm.addr(MALLORY);
        token.mint(from, 2 * amount);
        bytes32 authorization = keccak256(
            abi.encode(
                keccak256(
                    "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
                ),
                from,
                address(vault),
                amount,
                0,
                FOREVER,
                nonce
            )
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(MALLORY, _typed(authorization));
        vm.prank(submitter);
        vault.depositWithAuthorization(address(token), from, amount, 0, FOREVER, nonce, v, r, s);
        same(balance(from), amount, "credited");
        vm.prank(submitter);
        vm.expectRevert(abi.encodeWithSignature("ERC3009UsedAuthorization(address,bytes32)", from, nonce));
        vault.depositWithAuthorization(address(token), from, amount, 0, FOREVER, nonce, v, r, s);
        same(vault.liabilities(address(token)), PURSE + amount, "I1, I3");
    }

    function testFuzz_aPauseStopsLocksAndNotBonds(uint128 amount) public {
        amount = uint128(within(amount, 1, PURSE));
        vault.setPaused(true);
        vm.prank(address(channels));
        vm.expectRevert(abi.encodeWithSelector(IVault.Vault_Paused.selector));
        vault.lock(address(token), vm.addr(PAYER), amount);
        vm.prank(address(channels));
        vault.lockBond(address(token), vm.addr(PAYER), amount);
        same(vault.lockedBy(address(channels), address(token)), amount, "bond");
        vm.prank(address(channels));
        vault.release(address(token), vm.addr(PAYER), amount);
        same(balance(vm.addr(PAYER)), PURSE, "released (I9)");
    }

    function test_sealIsOnceAndDeployersOnly() public {
        address[] memory none = new address[](0);
        vm.expectRevert(abi.encodeWithSelector(IVault.Vault_AlreadySealed.selector));
        vault.seal(none);
        Vault fresh = new Vault(address(this), 0);
        vm.prank(vm.addr(MALLORY));
        vm.expectRevert(abi.encodeWithSelector(IVault.Vault_NotDeployer.selector, vm.addr(MALLORY)));
        fresh.seal(none);
        fresh.setToken(address(token), true);
        vm.expectRevert(abi.encodeWithSelector(IVault.Vault_NotSealed.selector));
        fresh.deposit(address(token), 1, address(this));
    }

    function _typed(bytes32 structHash) private view returns (bytes32) {
        return keccak256(abi.encodePacked(hex"1901", token.DOMAIN_SEPARATOR(), structHash));
    }
}
